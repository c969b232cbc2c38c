"""The steps of labelling, one file per step, in the order an item travels them.

``records`` draws what travels and ``errors`` what can go wrong; then ``storage``, ``sources``,
``decode``, ``windows``, ``fbank``, ``spectrogram_transformer``, ``checkpoints``, ``labels``,
``inference``, ``rows``, ``ledger``, ``commit``; ``label_audio`` joins them. Nothing here imports
``pipeline``.
"""

"""How ``earmark train`` teaches a model, a part per file in the order of the picture.

    inputs ─dataset─▶ labelled clips, decoded once ─batches─▶ waveforms ─augmentation─▶ features
                                                                                           │
      model's folder ◀─loop (resume)─ epochs of ◀─ pretraining, finetuning ◀───────────────┘
                           │                              ▲
                           └─▶ history                    └─ schedule

``dataset`` finds clips and their labels and decodes each once. ``batches`` decides which clips come
when; ``augmentation`` changes them. ``pretraining`` and ``finetuning`` are the two stages that
training can have; ``loop`` runs them epoch by epoch, and goes on where an earlier run was killed.
``validation`` scores clips as ``earmark label`` does. ``history`` writes the figures down.
"""

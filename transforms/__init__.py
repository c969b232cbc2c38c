"""The steps of labelling, a folder each. ``records`` draws what travels between them."""

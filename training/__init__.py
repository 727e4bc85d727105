"""Training small VAEs of the real architecture, and fine-tuning published ones: so that latents can be looked at.

Imports pipeline (to decode videos, and for its settings' base class) and cogvae; nothing imports this package but
jobs/ and tests/.
"""

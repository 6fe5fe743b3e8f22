"""Where training happens: what other libraries train and share, kept as observations and audited there.

One file per library, which is imported by those only who use it: `gradleak.integrations.transformers`, `.opacus`, `.flower`.
"""

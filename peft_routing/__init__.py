"""Routed adapters for PEFT: many LoRA experts on one base model, mixed per input by a router.

Nothing is here yet; the adapter type `ROUTED_LORA` is being built (see CHANGELOG.md).
"""

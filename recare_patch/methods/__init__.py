"""Erasing methods: each turns noisy latents into a loss, and none owns a loop."""

from recare_patch.methods.protocol import ErasingContext, Method, load_method, method_names

__all__ = ["ErasingContext", "Method", "load_method", "method_names"]

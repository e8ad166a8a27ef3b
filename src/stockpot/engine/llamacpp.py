"""llama.cpp as the engine uses it: choose a library, open a driver."""

from stockpot.engine.bindings.choice import BindingChoice, choose_binding
from stockpot.engine.llamacpp_driver import LlamaCppDriver
from stockpot.engine.llamacpp_open import fingerprint, open_driver

__all__ = ["BindingChoice", "LlamaCppDriver", "choose_binding", "fingerprint", "open_driver"]

"""The llama.cpp libraries Stockpot can run on, one thin file each, behind one class."""

from stockpot.engine.bindings.binding import Binding
from stockpot.engine.bindings.choice import BindingChoice, choose_binding, open_binding

__all__ = ["Binding", "BindingChoice", "choose_binding", "open_binding"]

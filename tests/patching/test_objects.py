"""Behaviour of a single object that differs from its class."""

from __future__ import annotations

import types

import torch

from wan_patches.patching.objects import own_methods


def test_own_methods_excludes_class_methods_and_values():
    conv = torch.nn.Conv3d(1, 1, 1)
    conv.activation = torch.nn.functional.silu  # no method of the class
    assert own_methods(conv) == set()
    conv.forward = conv.forward  # what removed hooks leave
    assert own_methods(conv) == set()
    conv.forward = torch.nn.Conv3d(1, 1, 1).forward  # of another object
    conv._conv_forward = types.MethodType(lambda self, *args: args[0], conv)
    assert own_methods(conv) == {"forward", "_conv_forward"}

"""What else scvi-tools saves, beyond the recorded models."""

import pytest
import torch
from test_scvi_tools import Payload, peer_content, save_peer

from scvi_lite.io.scvi_tools import read_scvi_tools


def test_a_function_among_the_options():
    """scvi-tools takes ``var_activation`` as a function, whose name is in the file."""
    content = peer_content()
    content["attr_dict"]["init_params_"]["kwargs"] = {"kwargs": {"var_activation": torch.nn.functional.softplus}}
    assert read_scvi_tools(save_peer(content)).arguments["var_activation"] == "softplus"


def test_a_function_is_not_called():
    content = peer_content()
    softplus = torch.nn.functional.softplus
    content["attr_dict"]["init_params_"]["kwargs"] = {"kwargs": {"var_activation": Payload(softplus, torch.zeros(2))}}
    with pytest.raises(ValueError, match="_Softplus is not plain data"):
        read_scvi_tools(save_peer(content))

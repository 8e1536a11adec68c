"""Importing this makes torch load all that it loads when it is first used, for processes that are forked later."""

import torch
from torch import nn

import fxcompress as fxc

torch.set_num_threads(1)
_net = fxc.compress(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)), torch.zeros(1, 1, 2, 2))
_optimizer = torch.optim.Adam(_net.param_groups())
(_net(torch.zeros(1, 1, 2, 2)).sum() + _net.size()).backward()
_optimizer.step()
_net.step()
_net.prune(_optimizer)

"""`TorchOptimizer`, which lets fastai's callbacks change the settings of an optimiser of torch."""

from __future__ import annotations

from typing import Any

from fastai.optimizer import OptimWrapper, detuplify_pg, set_item_pg


class TorchOptimizer(OptimWrapper):
    """fastai's wrapper of an optimiser of torch, whose `hypers` can be changed.

    The `hypers` of `OptimWrapper` are copies. fastai's `ReduceLROnPlateau` writes the new learning rate into them, so
    with `OptimWrapper` it says that it reduces the rate, and the optimiser keeps the old one.
    """

    @property
    def hypers(self) -> list[Hypers]:
        """The settings of each parameter group, by fastai's names: `lr`, `wd`, `mom`, `sqr_mom` and others."""
        return [Hypers(group, self.fwd_map) for group in self.opt.param_groups]


class Hypers(dict[str, Any]):
    """The settings of one parameter `group` of torch. A new value is also written into the group.

    `names` maps torch's name of a setting to fastai's; of a tuple such as `betas`, each element is a setting.
    """

    def __init__(self, group: dict[str, Any], names: dict[str, str]) -> None:
        self.group = group
        self.torch_names = {name: torch_name for torch_name, name in names.items()}
        values = detuplify_pg(group)
        super().__init__({names.get(name, name): value for name, value in values.items() if name != 'params'})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        set_item_pg(self.group, self.torch_names.get(name, name), value)

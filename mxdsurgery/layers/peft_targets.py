"""What PEFT knows of a family, for its converted models too. Travels with every exported checkpoint."""

import sys


class FamilyTargets:
    """Makes a config one for which PEFT has the family's defaults: the modules that LoRA and the like are put on.

    PEFT keeps them in tables by ``model_type``, which it asks a config for by ``to_dict()``. So that is where a converted
    model's type is entered, beside its family's, if PEFT is there: ``LoraConfig(task_type="CAUSAL_LM")`` is then enough.
    """

    def to_dict(self) -> dict:
        """As the family's config."""
        family = self.model_type.removeprefix("mxd-")
        tables = vars(sys.modules["peft.utils.constants"]) if "peft.utils.constants" in sys.modules else {}
        for name, table in tables.items():
            if name.endswith("_TARGET_MODULES_MAPPING") and isinstance(table, dict) and family in table:
                table.setdefault(self.model_type, table[family])
        return super().to_dict()

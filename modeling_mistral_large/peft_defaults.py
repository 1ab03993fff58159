"""What PEFT has to know of our model type."""

import sys

# Where PEFT keeps its defaults by model type, as plain dicts.
TABLES = ("peft.utils.constants", "peft.tuners.adaption_prompt.config")
MODEL_TYPE = "mistral_large"


def add_peft_defaults() -> None:
    """Give our model type what PEFT has for Mistral, whose modules have the same names; may run any number of times.

    PEFT is not imported: as long as nobody has imported it, nobody needs its defaults.
    """
    for name in TABLES:
        if name not in sys.modules:
            continue
        for table in list(vars(sys.modules[name]).values()):
            if isinstance(table, dict) and "mistral" in table:
                table.setdefault(MODEL_TYPE, table["mistral"])

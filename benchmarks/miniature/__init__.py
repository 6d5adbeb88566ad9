"""The paper's claims, tried on digits with models small enough for a laptop."""

STUDIES = ("scaling", "blocks", "guidance", "sampling", "training")

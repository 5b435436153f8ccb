"""One file per family: parsing of its config.json and its tensor mapping. Families are discovered automatically."""

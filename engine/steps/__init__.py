"""Training algorithms, one per file: the ordered updates of one iteration."""

"""Networks: plain single-device modules, each with a dataclass of its sizes."""

"""Operations that the engine and the pipelines share, one per file, each with its reference."""

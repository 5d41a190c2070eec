"""Models at some λ that can score and speak: one file per engine, heavy imports inside."""

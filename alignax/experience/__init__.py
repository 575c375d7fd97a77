from alignax.experience.logps import Experience, chain, logps

__all__ = ["Experience", "chain", "logps"]

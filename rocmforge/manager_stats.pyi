from rocmforge.shared_sequences import SharedSequences
from rocmforge.stats import CacheStats

def collect(manager: SharedSequences) -> CacheStats: ...

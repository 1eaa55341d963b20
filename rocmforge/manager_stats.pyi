from rocmforge.kv_cache_manager import KVCacheManager
from rocmforge.stats import CacheStats

def collect(manager: KVCacheManager) -> CacheStats: ...

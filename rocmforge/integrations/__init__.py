"""ROCmForge inside other libraries. Each module needs its extra, and is imported only when used."""

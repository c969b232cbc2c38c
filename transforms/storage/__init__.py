"""Storage behind one door: local paths and fsspec URLs, retries, web servers' folders."""

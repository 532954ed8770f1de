"""How the vendored files were made, one concern per file. Needs `pip install fusionbench-zoo[build]`."""

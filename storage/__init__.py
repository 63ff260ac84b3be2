"""The workspace: DuckDB tables and run folders."""

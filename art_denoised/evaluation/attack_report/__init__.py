"""What attacks left of models: figures from rows, as text, tables, files and a page."""

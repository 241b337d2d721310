"""One module per backend. Backends never import each other; `dispatch` holds the table."""

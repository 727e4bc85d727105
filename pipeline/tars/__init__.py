"""Videos in WebDataset tars: what lies where (headers, window, samples), what it is (probing), and getting it (members)."""

"""Makes every figure and table, each as a process of its own (``child``), and one ``page`` of their claims."""

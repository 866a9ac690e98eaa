"""What is made of results: the overview, the targets, the grid's tables, the pictures, the page and the README's section."""

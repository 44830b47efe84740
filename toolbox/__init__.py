"""What only has to work: data that is drawn, weights of others, tables, costs, pictures."""

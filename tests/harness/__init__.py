"""Programs that tests start beside the product's own: dishonest nodes. Nothing in the product knows of them."""

"""What commands do once their options are known; imported late, as it needs torch."""

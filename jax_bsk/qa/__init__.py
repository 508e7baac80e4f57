"""How this package is tested, validated and benchmarked; nothing else imports it."""

"""Block-sparse attention: the public function, its native and its plain-JAX implementation."""

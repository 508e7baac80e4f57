"""What every operation stands on: JAX and its versions, the native libraries, arrays; knows no operation."""

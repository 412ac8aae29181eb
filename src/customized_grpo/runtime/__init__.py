"""The machine and its libraries: devices, precision, memory, and what an error report says of them."""

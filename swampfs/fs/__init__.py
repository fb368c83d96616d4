"""The file system without pyfuse3: testable without a kernel."""

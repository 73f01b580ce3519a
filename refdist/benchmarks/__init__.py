"""The measurements, without their figures."""

"""Words that every room of the runtime speaks: slices, element types, errors of a device."""

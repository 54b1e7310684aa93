// Called by register.patch where the loader has copied a tensor out of a mapped file.

#pragma once

#include <cstddef>

// Gives the pages that lie wholly in [data, data + size) of a read-only file mapping back to the system. They may
// be read again, from the file.
void mobilellm_release_mapped(const void * data, size_t size);

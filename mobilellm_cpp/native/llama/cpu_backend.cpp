// A build for any processor of a kind has several CPU backends (GGML_BACKEND_DL). The best one for this processor is
// loaded together with libllama, from the folder where that lies, so every program that loads libllama has one. ggml's
// own search would look into the current directory, too.

#ifdef GGML_BACKEND_DL

#include "ggml-backend.h"

#include <dlfcn.h>

#include <string>

namespace {

bool load() {
    Dl_info here;
    if (!dladdr(reinterpret_cast<const void *>(&load), &here) || !here.dli_fname) {
        return false;
    }
    ggml_log_callback log  = nullptr;
    void *            data = nullptr;
    ggml_log_get(&log, &data);
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // it would say so on stderr at each import
    const std::string file = here.dli_fname;
    ggml_backend_load_all_from_path(file.substr(0, file.rfind('/') + 1).c_str());
    ggml_log_set(log, data);
    return true;
}

[[maybe_unused]] const bool loaded = load();

}  // namespace

#endif

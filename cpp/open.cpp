// Registry of open libraries, which stay open until the process ends.
#include <map>
#include <mutex>
#include <string>

#include "shim.h"

namespace aotron {

Library const& open_library(bool rtx, rust::Slice<const std::uint8_t> path)
{
    static std::mutex mutex;
    // Never destroyed: see Library.
    static auto& open = *new std::map<std::pair<bool, std::string>, std::unique_ptr<Library>>();
    std::pair<bool, std::string> key(rtx, std::string(path.begin(), path.end()));
    std::lock_guard<std::mutex> lock(mutex);
    auto found = open.find(key);
    if (found == open.end()) {
        auto library = rtx ? rtx::load(key.second) : enterprise::load(key.second);
        found = open.emplace(std::move(key), std::move(library)).first;
    }
    return *found->second;
}

std::int32_t header_version(bool rtx)
{
    return rtx ? rtx::header_version() : enterprise::header_version();
}

} // namespace aotron

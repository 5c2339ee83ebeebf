// Errors of the core: thrown as Error by the checks, turned into a status and a message at the C ABI.
#pragma once

#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <utility>

#include "fwp/fwp.h"

namespace fwp::core {

class Error : public std::exception {
 public:
  Error(int code, std::string message) : code_(code), message_(std::move(message)) {}
  int code() const noexcept { return code_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  int code_;
  std::string message_;
};

template <class... Parts>
[[noreturn]] void fail(int code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(code, text.str());
}

// The message of this thread's last error. Never allocates; a long message is cut.
void set_last_error(const char* message) noexcept;
const char* last_error() noexcept;

// Runs the body of a C function; whatever it throws becomes a status and a message.
template <class Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return FWP_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.code();
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return FWP_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return FWP_INTERNAL_ERROR;
  } catch (...) {
    set_last_error("unknown error");
    return FWP_INTERNAL_ERROR;
  }
}

}  // namespace fwp::core

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

// Code and message of this thread's last error. Never allocates; a long message is cut.
int set_last_error(int code, const char* message) noexcept;  // returns the code
int last_status() noexcept;
const char* last_error() noexcept;

// Runs the body of a C function; whatever it throws becomes a status and a message.
template <class Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return FWP_OK;
  } catch (const Error& error) {
    return set_last_error(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return set_last_error(FWP_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return set_last_error(FWP_INTERNAL_ERROR, error.what());
  } catch (...) {
    return set_last_error(FWP_INTERNAL_ERROR, "unknown error");
  }
}

}  // namespace fwp::core

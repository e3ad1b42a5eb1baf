// Reading a mapped file whose pages may fail to come: the disk or the file server gives an error, or the file was
// truncated. The kernel then sends SIGBUS, which would end the process without a word of what it was.
#pragma once

#include <atomic>
#include <csetjmp>

namespace illada {

// Makes ours the handler of SIGBUS, also where somebody has taken the signal since (faulthandler, torch's DataLoader in
// its workers). Signals that are not of a guarded copy go to whoever had it before. To be called before a map is made.
void InstallBusErrorHandler();

// In a forked child until it looks: what forks installs handlers before it calls the code that reads.
extern std::atomic<bool> bus_error_handler_unsure;

// Where the calling thread goes on from a SIGBUS; nullptr: it does not.
extern thread_local sigjmp_buf* bus_error_return __attribute__((tls_model("initial-exec")));

// Calls copy(), which reads mapped files, holds nothing that would have to be destroyed and does not throw. Returns
// false when a page could not be had; what was copied until then is of no use.
template <typename Copy>
bool CopyWithoutBusError(const Copy& copy) {
  if (bus_error_handler_unsure.load(std::memory_order_relaxed)) InstallBusErrorHandler();
  sigjmp_buf here;
  // the mask is not saved (a system call); the handler leaves it alone
  if (sigsetjmp(here, 0) != 0) {
    bus_error_return = nullptr;
    return false;
  }
  bus_error_return = &here;
  copy();
  bus_error_return = nullptr;
  return true;
}

}  // namespace illada

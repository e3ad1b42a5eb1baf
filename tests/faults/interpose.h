// What interpose.c shares with injection.py (the control file and the journal) and with its own wrappers.
#pragma once

#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>

#define FAULTS 16

enum action { FAIL, FAIL_AFTER, SHORT, DELAY, HANG, FREEZE, KILL, STOP };

struct fault {
  _Atomic int32_t armed;  // 0: not; else a number that no other fault has had
  int32_t rank;           // -1: any process
  int32_t action;
  int32_t error;
  int64_t first, last;  // of the calls that match, counted from 1 over all processes
  int64_t argument;     // SHORT: bytes; DELAY: milliseconds
  _Atomic int64_t seen, fired;
  char calls[256];  // " open write ", or "" for all
  char path[512];   // fnmatch's pattern of the path below the directory
};

struct control {
  char root[PATH_MAX];
  _Atomic int32_t journal;  // 0: none, 1: calls, 2: with what is written
  int32_t padding;
  struct fault faults[FAULTS];
};

// In the journal, followed by the call's name, its one or two paths, and what it wrote.
struct record {
  uint32_t size, flags;
  int32_t rank, pid, error, injected;
  int64_t result, offset, time_ns;
  uint64_t inode;
  uint32_t call_bytes, path_bytes, other_bytes, data_bytes;
};

enum { CREATED = 1, TRUNCATED = 2 };

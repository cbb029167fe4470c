#pragma once

#include <sstream>
#include <stdexcept>

// A condition on the caller's data. Python sees std::invalid_argument as ValueError, where
// STD_TORCH_CHECK would give a RuntimeError with a source line in front of the sentence.
#define LEGO_CHECK_VALUE(condition, message)       \
  do {                                             \
    if (!(condition)) {                            \
      std::ostringstream sentence;                 \
      sentence << message;                         \
      throw std::invalid_argument(sentence.str()); \
    }                                              \
  } while (false)

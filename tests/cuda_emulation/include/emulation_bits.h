#pragma once
#include <cstdint>
#include <cstring>

// The bits of a number as another type of the same size.
template <class To, class From> static inline To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "numbers of the same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

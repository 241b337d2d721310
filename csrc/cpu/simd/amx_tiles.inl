// AMX's tile registers, for the files of this folder that multiply in them.
//
// Five of the eight in use at a time, three sums and two operands. A core whose other hardware thread is busy has
// copies for half as many, and with eight in use the next load waits for the product before it: 31 to 50 ns a product
// of int8 then, 13 to 20 with five (measured). On a core by itself it is 8 and 7.

// What ldtilecfg reads: every tile is 16 rows of 64 bytes.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The registers are this thread's to use while one of these lives.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kShapes); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;

 private:
  // not on the stack: GCC's _tile_loadconfig says that it reads eight bytes, and the others may not have been written
  static constexpr TileShapes kShapes{};
};

// GCC's _tile_loadd does not say that it reads memory: what was stored before this is in memory, and stays.
SFACE_INLINE void finish_writing() { asm volatile("" ::: "memory"); }

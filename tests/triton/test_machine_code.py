"""Loops, spills and epilogues read from listings small enough to check by eye."""

from __future__ import annotations

from sface_kernels.backends.triton.tools import machine_code as m


def sass(*lines: str) -> tuple[m.Instruction, ...]:
    return m.parse("\n".join(f"        /*{16 * at:04x}*/   {line} ;   /* 0x0 */" for at, line in enumerate(lines)))


# a tile loop [1, 11] around a rolled product [2, 4]; 7 to 8 are skipped where nothing is found; padding at the end
TILES = (
    "MOV R1, R2",
    "MOV R3, R4",
    "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24",
    "IADD3 R5, R5, 0x1, RZ",
    "@P0 BRA 0x20",
    "MUFU.EX2 R6, R7",
    "@!P1 BRA 0x90",
    "STL [R1], R6",
    "BRA 0x70",
    "FADD R8, R8, R6",
    "IADD3 R9, R9, 0x1, RZ",
    "@P2 BRA 0x10",
    "EXIT",
    "BRA 0xd0",
    "NOP",
)


def test_loops():
    code = sass(*TILES)
    assert len(code) == 14
    # [7, 8] and 13 run for ever, and 7 to 8 have no way back to the tile loop
    assert [sorted(loop) for loop in m.loops(code)] == [[7, 8], [2, 3, 4], [1, 2, 3, 4, 5, 6, 9, 10, 11]]
    assert [sorted(loop) for loop in m.product_loops(code)] == [[2, 3, 4]]


def test_epilogue_takes_the_short_way():
    """2 → 3, 4, 5, 6, 9, 10, 11, 1 → 2: eight instructions from a product to the next."""
    assert m.epilogue(sass(*TILES)) == 8
    assert m.epilogue(sass("HMMA.16816.F32 R4, R8, R10, R4", "@P0 BRA 0x0", "MUFU.EX2 R1, R2", "EXIT")) is None


def test_spills_count_where_they_stand():
    outside = sass(*TILES)
    assert m.count(outside, m.LOCAL_MEMORY) == 1 and m.count_in_product_loops(outside, m.LOCAL_MEMORY) == 0
    inside = sass(*TILES[:3], "LDL R5, [R1]", *TILES[4:])
    assert m.count_in_product_loops(inside, m.LOCAL_MEMORY) == 1


def test_a_jump_back_into_the_middle_is_no_loop():
    """A block moved behind the exit, entered from and returning to code that runs once."""
    assert m.loops(sass("MOV R1, R2", "@P0 BRA 0x40", "MOV R3, R4", "EXIT", "MOV R5, R6", "BRA 0x20")) == []


def test_threads_meet_behind_a_branch():
    """BSYNC goes on where its BSSY says: the loop around it is seen, and nothing else."""
    code = sass("BSSY B0, 0x40", "@P0 BRA 0x30", "FADD R1, R1, R2", "BSYNC B0", "@P1 BRA 0x0", "EXIT")
    assert [sorted(loop) for loop in m.loops(code)] == [[0, 1, 2, 3, 4]]


def test_fp64_is_seen():
    assert m.count(sass("DFMA R2, R4, R6, R2", "F2F.F64.F32 R2, R4", "FFMA R1, R2, R3, R4", "EXIT"), m.FP64) == 2


def test_amd_assembly():
    code = m.parse(
        "\t.text\nkernel:\n\ts_mov_b32 s0, s1\n.LBB0_1:\n\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]\n"
        "\tscratch_load_dword v1, off, s0 ; 4-byte Folded Reload\n\ts_cbranch_scc1 .LBB0_1\n\ts_branch .LBB0_3\n"
        ".LBB0_2:\n\ts_endpgm\n.LBB0_3:\n\tv_exp_f32_e32 v2, v3\n\ts_branch .LBB0_2\n.Lfunc_end0:\n\ts_nop 0\n"
    )
    assert [instruction.text.split()[0] for instruction in code][-2:] == ["v_exp_f32_e32", "s_branch"]
    assert [sorted(loop) for loop in m.product_loops(code)] == [[1, 2, 3]]
    assert m.count_in_product_loops(code, m.LOCAL_MEMORY) == 1


def test_a_product_minus_itself_is_seen_in_ptx():
    """LLVM fuses v − v, where v is a product, into the product's rounding error."""
    product = "mul.f32 \t%r3, %r1, %r2;\n"
    assert m.rounding_residues(product + "neg.f32 %r4, %r3;\nfma.rn.f32 \t%r5, %r2, %r1, %r4; // v - v")
    assert m.rounding_residues(product + "neg.f32 %r4, %r1;\nfma.rn.f32 \t%r5, %r4, %r2, %r3;")
    pairs = "mul.f32x2 %rd3, %rd1, %rd2;\nneg.f32x2 %rd4, %rd3;\nfma.rn.f32x2 %rd5, %rd1, %rd2, %rd4;"
    assert m.rounding_residues(pairs)
    for right in (
        "neg.f32 %r4, %r9;\nfma.rn.f32 %r5, %r1, %r2, %r4;",  # less another value
        "fma.rn.f32 %r5, %r1, %r2, %r3;",  # twice the product
        "neg.f32 %r4, %r3;\nfma.rn.f32 %r5, %r1, %r9, %r4;",  # less another product
    ):
        assert not m.rounding_residues(product + right)


def test_a_stride_in_32_bits_is_seen():
    wide = "tt.func @f(%x_stride_n: i32)\n  %x_1 = arith.extsi %x_stride_n : i32 to i64 loc(#loc1)\n"
    assert not m.narrow_strides(wide)
    assert m.narrow_strides(wide + "  %x_2 = tt.splat %x_stride_n : i32 -> tensor<64xi32> loc(#loc2)")
    assert m.narrow_strides(wide + "  %x_2 = arith.muli %row, %w_stride_c : i32 loc(#loc2)")

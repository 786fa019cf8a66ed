// Command tlog reads a log that tracevault made, or makes one for it, with the packages of Go's checksum database.
// Input and output are JSON; "check" ends with status 1 where anything is not as Go would have it.
package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const height = 8

type record struct {
	Index int64    `json:"index"`
	Hash  []byte   `json:"hash"`
	Proof [][]byte `json:"proof"`
}

type step struct {
	Old   int64    `json:"old"`
	Root  []byte   `json:"root"`
	Proof [][]byte `json:"proof"`
}

type log struct {
	Key        string            `json:"vkey"`
	Checkpoint string            `json:"checkpoint"`
	Tiles      map[string][]byte `json:"tiles"`
	Records    []record          `json:"records"`
	Steps      []step            `json:"steps"`
}

type plan struct {
	Name   string   `json:"name"`
	Leaves [][]byte `json:"leaves"`
	Index  []int64  `json:"index"`
	Old    []int64  `json:"old"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func toHash(data []byte) (hash tlog.Hash) {
	if copy(hash[:], data) != len(data) || len(data) != tlog.HashSize {
		check(fmt.Errorf("a hash of %d bytes", len(data)))
	}
	return hash
}

func toHashes(data [][]byte) (hashes []tlog.Hash) {
	for _, one := range data {
		hashes = append(hashes, toHash(one))
	}
	return hashes
}

func fromHashes(hashes []tlog.Hash) [][]byte {
	data := [][]byte{}
	for _, hash := range hashes {
		data = append(data, append([]byte{}, hash[:]...))
	}
	return data
}

// path names a tile as C2SP does: Go's own has the height in front.
func path(tile tlog.Tile) string {
	return strings.Replace(tile.Path(), fmt.Sprintf("tile/%d/", height), "tile/", 1)
}

type tiles map[string][]byte

func (stored tiles) Height() int { return height }

func (stored tiles) ReadTiles(wanted []tlog.Tile) (data [][]byte, err error) {
	for _, tile := range wanted {
		found, ok := stored[path(tile)]
		if !ok {
			return nil, fmt.Errorf("no tile %s", path(tile))
		}
		data = append(data, found)
	}
	return data, nil
}

func (stored tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// storage keeps the hashes of a tree in memory, in Go's order.
func storage() (*[]tlog.Hash, tlog.HashReader) {
	stored := &[]tlog.Hash{}
	return stored, tlog.HashReaderFunc(func(indexes []int64) (hashes []tlog.Hash, err error) {
		for _, index := range indexes {
			hashes = append(hashes, (*stored)[index])
		}
		return hashes, nil
	})
}

func checkLog() {
	var given log
	check(json.NewDecoder(os.Stdin).Decode(&given))
	verifier, err := note.NewVerifier(given.Key)
	check(err)
	opened, err := note.Open([]byte(given.Checkpoint), note.VerifierList(verifier))
	check(err)
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		check(fmt.Errorf("no checkpoint: %q", opened.Text))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	check(err)
	root, err := tlog.ParseHash(lines[2])
	check(err)

	// Whatever a client of Go reads is read by this; but in x/mod 0.7 it lets some full tiles pass unchecked.
	client := tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, tiles(given.Tiles))
	var leaves []tlog.Hash
	for index := int64(0); index < size; index++ {
		found, err := client.ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
		check(err)
		leaves = append(leaves, found...)
	}
	// So the tree is made anew from the leaves.
	stored, reader := storage()
	for index, leaf := range leaves {
		more, err := tlog.StoredHashesForRecordHash(int64(index), leaf, reader)
		check(err)
		*stored = append(*stored, more...)
	}
	computed, err := tlog.TreeHash(size, reader)
	check(err)
	if computed != root {
		check(fmt.Errorf("the tiles have the root %v", computed))
	}
	seen := 0
	for _, tile := range tlog.NewTiles(height, 0, size) {
		if tile.W != 1<<height && size>>uint(height*tile.L) != tile.N<<height+int64(tile.W) {
			continue // a partial tile of a smaller tree
		}
		data, err := tlog.ReadTileData(tile, reader)
		check(err)
		if !bytes.Equal(data, given.Tiles[path(tile)]) {
			check(fmt.Errorf("tile %s differs", path(tile)))
		}
		seen++
	}
	if seen != len(given.Tiles) {
		check(fmt.Errorf("%d tiles, and Go has %d", len(given.Tiles), seen))
	}
	for _, one := range given.Records {
		check(tlog.CheckRecord(toHashes(one.Proof), size, root, one.Index, toHash(one.Hash)))
	}
	for _, one := range given.Steps {
		check(tlog.CheckTree(toHashes(one.Proof), size, root, one.Old, toHash(one.Root)))
	}
}

func makeLog() {
	var wanted plan
	check(json.NewDecoder(os.Stdin).Decode(&wanted))
	private, public, err := note.GenerateKey(rand.Reader, wanted.Name)
	check(err)
	signer, err := note.NewSigner(private)
	check(err)

	stored, reader := storage()
	for index, leaf := range wanted.Leaves {
		more, err := tlog.StoredHashes(int64(index), leaf, reader)
		check(err)
		*stored = append(*stored, more...)
	}
	size := int64(len(wanted.Leaves))
	root, err := tlog.TreeHash(size, reader)
	check(err)
	text := fmt.Sprintf("%s\n%d\n%s\n", wanted.Name, size, base64.StdEncoding.EncodeToString(root[:]))
	signed, err := note.Sign(&note.Note{Text: text}, signer)
	check(err)

	made := log{Key: public, Checkpoint: string(signed), Tiles: map[string][]byte{}}
	for _, tile := range tlog.NewTiles(height, 0, size) {
		data, err := tlog.ReadTileData(tile, reader)
		check(err)
		made.Tiles[path(tile)] = data
	}
	for _, index := range wanted.Index {
		proof, err := tlog.ProveRecord(size, index, reader)
		check(err)
		hash := tlog.RecordHash(wanted.Leaves[index])
		made.Records = append(made.Records, record{index, hash[:], fromHashes(proof)})
	}
	for _, old := range wanted.Old {
		proof, err := tlog.ProveTree(size, old, reader)
		check(err)
		before, err := tlog.TreeHash(old, reader)
		check(err)
		made.Steps = append(made.Steps, step{old, before[:], fromHashes(proof)})
	}
	check(json.NewEncoder(os.Stdout).Encode(made))
}

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "check":
		checkLog()
	case len(os.Args) == 2 && os.Args[1] == "make":
		makeLog()
	default:
		check(fmt.Errorf("usage: tlog check|make"))
	}
}

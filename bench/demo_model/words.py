"""Word lists of the recall documents. A key is one of FIRST_WORDS and one of SECOND_WORDS: "amber falcon"."""

FIRST_WORDS: tuple[str, ...] = tuple(
    """
    amber ancient arctic ashen azure balmy barren bitter blazing bleak bold boreal brave breezy bright brisk brittle
    bronze burnt calm candid cheerful chilly civil clear clever cloudy coastal cobalt copious coral cosmic crafty
    crimson crisp curious curly cyan dainty damp daring dark dawn deep dense devout dim distant double drowsy dry
    dusky dusty eager early earnest ebony elder elegant emerald empty endless even exotic faded faint fair famous
    fancy feral fertile fiery final fleet floral fluffy foggy formal fragile frank free fresh frosty frozen gallant
    gentle giant gilded glad gleaming glossy golden graceful grand granite grassy gray green grim hardy hasty hazel
    hazy heavy hidden hollow honest humble humid idle indigo inner ivory jade jagged jolly joyful keen kind large
    lasting late lavish lazy leafy lilac lime little lively lofty lonely loud lovely loyal lucky lunar magenta magic
    maroon marble mellow merry mighty mild misty modest mossy muddy mute narrow navy neat nimble noble noisy novel
    oaken obscure ocean odd olive opal orange orderly outer pale patient pearly placid plain playful pleasant polar
    polite proud prudent purple quaint quick quiet radiant rainy rapid rare ready regal remote restless rigid ripe
    robust rocky rosy rough round royal ruby rugged rural russet rustic sacred saffron sandy sapphire scarlet secret
    serene shady sharp shiny silent silky silver simple sincere sleek sleepy slender slow smoky smooth snowy sober
    solar solemn
    """.split()
)

SECOND_WORDS: tuple[str, ...] = tuple(
    """
    acorn anchor antler anvil apple arrow aspen aurora axle badger bamboo banner barley basin basket beacon beaver
    bell birch bison bluff bobcat bonfire boulder bramble bridge brook buckle buffalo burrow cabin cactus camel
    candle canoe canyon caravan cardinal caribou castle cavern cedar cellar chalice chapel cherry cinder citadel
    cliff clover cobra comet compass condor cottage cougar coyote cradle crane crater creek crest cricket crown
    crystal cypress dagger daisy delta desert dolphin donkey dove dragon drum dune eagle echo eclipse elk ember
    falcon farm feather fern ferret fiddle field finch fjord flame flute forest forge fortress fossil fountain fox
    gannet garden garnet gate gazelle geyser ginger glacier glade goose gopher gorge grotto grove gull hammer harbor
    hare harp harvest hawk hearth heath hedge heron hill hollyhock honey horizon hornet horse ibis iceberg iguana
    inlet iris island ivy jackal jaguar jasmine jay juniper kernel kestrel kettle kite lagoon lake lamp lantern
    larch lark lemon leopard lily linden lizard llama locket lodge loom lotus lynx magnet magpie mallard mantle
    maple marlin marsh marten meadow mill mirror moon moose moraine mountain nectar needle nettle nutmeg oasis oak
    ocelot onyx orchard orchid osprey otter owl oyster paddle palace panther parrot pasture pebble pelican penguin
    pepper phoenix pigeon pine pinnacle plateau plover plume pond poplar poppy prairie prism puffin quail quarry
    quartz rabbit rapids raven reef ridge river robin rocket rose saddle salmon scepter sparrow spruce
    """.split()
)

MATERIALS: tuple[str, ...] = tuple(
    """
    steel iron copper brass tin zinc nickel lead pewter titanium ceramic glass plastic rubber leather cotton linen
    wool silk canvas paper cardboard wooden bamboo cork wax clay stone slate carbon nylon foam felt woven painted
    polished spare sealed folded printed coated
    """.split()
)

GOODS: tuple[str, ...] = tuple(
    """
    bolts screws nails washers hinges brackets springs gears valves pipes hoses cables wires fuses sockets switches
    lamps bulbs batteries chargers tiles bricks planks beams panels sheets rods tubes bars chains ropes nets sacks
    crates boxes barrels bottles jars cups plates bowls spoons forks knives pans kettles blankets pillows towels
    curtains carpets coats gloves boots hats scarves belts bags tents maps books pens pencils stamps cards coins
    keys locks drums flutes violins bells clocks mirrors frames brushes buckets shovels hammers wrenches chisels
    files saws drills clamps ladders carts wheels tires pedals saddles oars sails anchors buoys lenses magnets
    filters pumps
    """.split()
)

PLACES: tuple[str, ...] = tuple(
    """
    hall yard tower cellar annex depot market station library workshop office garage kitchen museum theater school
    temple mill wharf dock warehouse archive studio stable barn attic basement corridor courtyard gallery
    """.split()
)

SIDES: tuple[str, ...] = tuple("northern southern eastern western upper lower central rear front inner".split())

DAYS: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

MONTHS: tuple[str, ...] = tuple(
    "January February March April May June July August September October November December".split()
)
